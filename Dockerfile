# ima-seg with nnU-Net and PyTorch (with CUDA) for any user, read-only, and without a network once it is built.
# docs/howto/cluster.md says how to run it.
FROM python:3.12-slim-bookworm

# Triton and torch.compile build their kernels with a compiler, at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY ima_seg /src/ima_seg
COPY nnunet_trainers /src/nnunet_trainers
COPY datasets /src/datasets
RUN pip install --no-cache-dir /src && rm -r /src

# Nothing is written but under /tmp, and where data are mounted. Users need no entry in /etc/passwd.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=ima \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCH_HOME=/tmp/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    nnUNet_raw=/data/raw \
    nnUNet_preprocessed=/data/preprocessed \
    nnUNet_results=/data/results

USER 1000:1000
WORKDIR /data

# No entry point: nnUNetv2_train and its kin are called by name, too.
CMD ["ima-seg", "doctor"]
