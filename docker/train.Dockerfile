# Training, data and evaluation. From the repository's root:
#
#   docker build -f docker/train.Dockerfile -t clipstack-train .                                  CPU
#   docker build -f docker/train.Dockerfile -t clipstack-train:cuda --build-arg TORCH_INDEX_URL= .   NVIDIA GPUs
#
# In its working folder every command of docs/training.md runs as it stands there. docs/deploy.md says how several
# machines train together.

# Any Debian-like image with Python 3.11 or newer as python3, its venv module, useradd, and CA certificates.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# Triton and torch.compile compile small C files while they train. A base whose Python is Debian's also needs
# libpython3-dev.
ARG DEBIAN_PACKAGES="g++"
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ${DEBIAN_PACKAGES} \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH TORCH_EXTENSIONS_DIR=/opt/extensions

FROM base AS build
# Where torch and torchvision come from. Empty: from pip's own index, whose builds are for CUDA.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG EXTRAS="train data eval"
# Which extensions of DeepSpeed are compiled ahead. clipstack itself asks for none (docs/decisions/no-compiler.md);
# those for CUDA (FusedAdamBuilder) need a base with nvcc.
ARG DEEPSPEED_OPS="ShareMemCommBuilder"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Every version is that of constraints.txt, the build tools' included.
ENV PIP_CONSTRAINT=/opt/clipstack/constraints.txt PIP_BUILD_CONSTRAINT=/opt/clipstack/constraints.txt
WORKDIR /opt/clipstack
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt ./
COPY docker/requirements.py docker/warm_extensions.py docker/
# The secret "pip" may hold a pip.conf with mirrors and credentials; it stays in no layer.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch torchvision
# DeepSpeed is packed from source and looks at torch while that happens: the build tools have to be there first.
# hadolint ignore=DL3013,SC2086
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install setuptools wheel packaging hatchling editables numpy \
    && python docker/requirements.py ${EXTRAS} > /tmp/requirements.txt \
    && DS_BUILD_OPS=0 pip install --no-build-isolation --requirement /tmp/requirements.txt
# hadolint ignore=SC2086
RUN DS_ACCELERATOR=cpu python docker/warm_extensions.py ${DEEPSPEED_OPS}
COPY README.md LICENSE ./
COPY clipstack clipstack
COPY serve serve
COPY data_pipelines data_pipelines
COPY configs configs
# Editable: `deepspeed clipstack/train.py` and `clipstack train` are then one and the same code.
RUN pip install --no-deps --no-build-isolation --editable . && pip check && rm -rf /opt/clipstack/docker

FROM base
LABEL org.opencontainers.image.title="clipstack-train" \
      org.opencontainers.image.description="Pretrains CLIP-style models with DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 clipstack \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin clipstack \
    && install --directory --owner=10001 --group=10001 /data /models \
    && install --directory --mode=1777 /cache
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/clipstack /opt/clipstack
# Loading an extension takes a lock in its folder, whoever runs it.
COPY --from=build --chown=10001:10001 /opt/extensions /opt/extensions
RUN chmod -R a+rwX /opt/extensions
# What is compiled while training is kept in a volume. USER is for a container run under another uid, which has no name.
ENV HOME=/cache TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor USER=clipstack
ENV PYTHONUNBUFFERED=1
VOLUME /cache
WORKDIR /opt/clipstack
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["clipstack", "--help"]
