# An image with the exact versions of constraints.txt, the same installation as `make venv` without the tests.
#   docker build -t rlhf_trl .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" -v "$HOME/.cache/huggingface:/cache" rlhf_trl stage=ppo
# Without a GPU, with PyTorch's CPU build:
#   docker build -t rlhf_trl --build-arg PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" .
# PyTorch's wheels bring their CUDA libraries, so that no CUDA image is needed, only NVIDIA's container toolkit.
FROM python:3.11-slim

# A compiler for PyTorch's Triton kernels
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG PIP_FLAGS=""
ENV PIP_NO_CACHE_DIR=1 HF_HOME=/cache PYTHONUNBUFFERED=1

# torch by itself: its layer stays when the code changes
COPY constraints.txt /source/
RUN pip install $PIP_FLAGS "$(grep '^torch==' /source/constraints.txt)"

COPY pyproject.toml README.md LICENSE /source/
COPY rlhf_trl /source/rlhf_trl
COPY conf /source/conf
COPY launch /source/launch
RUN pip install $PIP_FLAGS -c /source/constraints.txt "/source[math,qlora,serve,sweep,tensorboard,wandb]"

# Runs and data stand where the container is started
WORKDIR /workspace
ENTRYPOINT ["rlhf-trl"]
CMD ["--help"]
