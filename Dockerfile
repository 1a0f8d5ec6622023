# An image with what a training job needs. Build one wheel first: rm -f dist/*.whl && python -m build --wheel
#   docker build -t coca_lit .
# For CPUs alone, in 1.9 GB:
#   docker build -t coca_lit --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# It runs as any user; outputs and caches go into folders of that user, which must exist before. Data workers send
# batches through /dev/shm, of which Docker gives 64 MB: hence --ipc=host (or --shm-size=16g).
#   mkdir -p outputs cache
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v /data:/data -v "$PWD/outputs:/work/outputs" -v "$PWD/cache:/cache" coca_lit coca-train experiment=pretrain_b32 data.shards='/data/{00000..41455}.tar'
# With --read-only add --tmpfs /tmp. model.compile=true needs what is left out: a C++ compiler and, on GPUs, Triton.
FROM python:3.12-slim
ARG TORCH_INDEX
# Triton takes 1 GB and needs a C compiler. With CUDA 5.65 GB are left: PyTorch 2.15 links or opens libraries of 3.9 GB,
# and what it never loads (headers, device code, cuSOLVER for several GPUs) is 0.3 GB.
RUN --mount=type=bind,source=dist,target=/dist \
    if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" torch torchvision; fi \
    && pip install --no-cache-dir "$(ls /dist/*.whl)[remote,tensorboard,wandb]" \
    && pip uninstall --yes triton \
    && mkdir -p -m 1777 /cache /work/outputs && chmod 1777 /work
# Users without an entry in passwd have no name and no home: libraries take both from the environment.
ENV HOME=/cache HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch MPLCONFIGDIR=/cache/matplotlib LOGNAME=coca
WORKDIR /work
USER 1000:1000
CMD ["coca-train", "--help"]
