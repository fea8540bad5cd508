# Two images of `qtool serve`, from a checkout:
#
#   docker build --target cpu  -t qtool:0.1.0-cpu  .
#   docker build --target cuda -t qtool:0.1.0-cuda .
#   docker run --rm -p 8000:8000 -v qtool-cache:/cache qtool:0.1.0-cpu serve Qwen/Qwen3-0.6B --host 0.0.0.0
#
# Nothing of the machine is in the image: kernels for CPUs are compiled for the CPU that they find, on the first start, and
# kept in /cache beside what is downloaded; CUDA comes with PyTorch's own wheels and the host's driver.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
# The compiler serves at run time: for the kernels, and on a GPU for Triton's launchers. Its version is Debian's: a pinned one
# would be gone from the mirrors with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home qtool \
    && mkdir -p /cache /models \
    && chown 10001:10001 /cache

FROM base AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS installed
COPY constraints.txt /wheels/constraints.txt
COPY --from=wheel /wheels /wheels
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --retries=6 --start-period=30m --start-interval=2s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["qtool"]
CMD ["serve", "--help"]

FROM installed AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c /wheels/constraints.txt --extra-index-url "${TORCH_INDEX}" /wheels/*.whl
USER 10001
WORKDIR /models

FROM installed AS cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install -c /wheels/constraints.txt --extra-index-url "${TORCH_INDEX}" \
    "$(echo /wheels/qtool-*.whl)[gpu]"
USER 10001
WORKDIR /models
