# weft on a CPU: docker build -t weft . && docker run -p 127.0.0.1:8000:8000 -v weft:/var/lib/weft -e WEFT_API_KEY weft
# (docs/operating.md says more: keys, models, GPUs, where the base and PyTorch come from)

# Any Debian with Python 3.11 or later, its venv and its headers, under the name `python`.
ARG BASE=python:3.13-slim-bookworm

# The kernels are compiled here; the compiler stays behind.
FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ cmake ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY weft ./weft
RUN python -m venv /opt/weft && /opt/weft/bin/pip install --no-cache-dir \
    --extra-index-url ${TORCH_INDEX} -c constraints.txt ".[otel]" \
    && /opt/weft/bin/python -P -c "import weft.native._native"

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/weft --create-home --shell /usr/sbin/nologin weft
COPY --from=build /opt/weft /opt/weft
ENV PATH=/opt/weft/bin:$PATH WEFT_HOME=/var/lib/weft HF_HOME=/var/lib/weft/hub PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/weft
VOLUME /var/lib/weft
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["weft", "serve"]
CMD ["bundled", "--host", "0.0.0.0", "--log-format", "json"]
