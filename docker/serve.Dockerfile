# The REST API. From the repository's root:
#
#   docker build -f docker/serve.Dockerfile -t clipstack-serve .                                  CPU
#   docker build -f docker/serve.Dockerfile -t clipstack-serve:cuda --build-arg TORCH_INDEX_URL= .   NVIDIA GPUs
#
# docs/deploy.md says how to run it, and how to build it from other bases and mirrors.

# Any image with Python 3.11 or newer as python3, its venv module, useradd, and CA certificates.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Where torch and torchvision come from. Empty: from pip's own index, whose builds are for CUDA.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Every version is that of constraints.txt, the build tools' included.
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_BUILD_CONSTRAINT=/build/constraints.txt
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt docker/requirements.py ./
# The secret "pip" may hold a pip.conf with mirrors and credentials; it stays in no layer.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch torchvision
# One layer for everything that others wrote: it stays as it is when our sources change.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python requirements.py serve openvino > requirements.txt && pip install --requirement requirements.txt
COPY README.md LICENSE ./
COPY clipstack clipstack
COPY serve serve
COPY data_pipelines data_pipelines
COPY configs configs
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps . && pip check && pip uninstall --yes pip

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="clipstack-serve" \
      org.opencontainers.image.description="Zero-shot classification and embeddings over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0"
# Its home is the volume, so that whatever a library caches goes there, too.
RUN groupadd --gid 10001 clipstack \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /state --shell /usr/sbin/nologin clipstack \
    && install --directory --owner=10001 --group=10001 /models /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV CLIPSTACK_SERVE_HOST=0.0.0.0 CLIPSTACK_SERVE_PORT=8000
# Nothing is written anywhere else, so that the root file system can be read-only. torch wants a folder for temporary
# files as soon as it is imported.
ENV CLIPSTACK_SERVE_LABEL_SET_FILE=/state/label-sets.sqlite3 TMPDIR=/state
VOLUME /state
WORKDIR /models
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready once known inputs give their known vectors; urlopen raises for every other status than 200.
HEALTHCHECK --interval=10s --timeout=12s --start-period=120s --retries=3 CMD ["python", "-I", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['CLIPSTACK_SERVE_PORT'] + '/readyz', timeout=11)"]
ENTRYPOINT ["clipstack", "serve"]
