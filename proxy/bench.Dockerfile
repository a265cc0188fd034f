# `tautap bench`, and what tau-bench imports: from a checkout that is mounted, run by this image's Python.
ARG BASE=python:3.11.13-slim-bookworm
FROM ${BASE}
RUN useradd --uid 10001 --create-home tautap && install -d -o tautap -g tautap /results
COPY . /src
RUN python3 -m venv /opt/tautap \
 && /opt/tautap/bin/pip install --no-cache-dir --constraint /src/proxy/constraints.txt \
    litellm mcp requests /src
ENV PATH=/opt/tautap/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
ENTRYPOINT ["tautap", "bench"]
