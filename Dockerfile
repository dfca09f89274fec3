# skipfast in a container: docs/docker.md. The steps are the README's.
#   docker build -t skipfast . && docker run --rm skipfast
# For a GPU, PyPI's own torch, which brings CUDA:
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t skipfast-cuda . && docker run --rm --gpus all skipfast-cuda
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# The C++ kernels are built for the machine that runs them, so the compiler stays in the image. Triton needs it, too.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /skipfast
COPY requirements.txt ./
RUN pip install "torch<=2.13.0" --index-url ${TORCH_INDEX}
RUN pip install -r requirements.txt
COPY . ./
CMD ["python", "generate.py"]
