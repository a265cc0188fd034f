# The worker without a GPU: vLLM's CPU build and the embedded model. From the repository: docker build -f worker/cpu.Dockerfile .
ARG BASE=python:3.11.13-slim-bookworm
FROM ${BASE}
# PyPI's torch is for CUDA; this is PyTorch's own index of wheels for the CPU.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home tautap && install -d -o tautap -g tautap /run/tautap
COPY . /src
# Of what comes with vLLM, three are CUDA builds that take transformers down with them; the worker needs none.
RUN python3 -m venv /opt/tautap \
 && /opt/tautap/bin/pip install --no-cache-dir --constraint /src/worker/constraints.txt "/src[worker-cpu]" \
 && /opt/tautap/bin/pip uninstall --yes torchvision torchaudio torchcodec
ENV PATH=/opt/tautap/bin:$PATH HOME=/home/tautap USER=tautap PYTHONUNBUFFERED=1
WORKDIR /home/tautap
USER 10001
RUN python3 -c "from pathlib import Path; from worker.smollm import ensure; ensure(Path.home() / '.cache/tautap')"
ENTRYPOINT ["tautap", "worker"]
