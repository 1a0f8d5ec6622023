# The wheel with everything a training job on a cluster needs. Build the wheel first: python -m build --wheel
#   docker build -t coca_lit .
#   docker run --gpus all -v /data:/data -v $PWD/outputs:/work/outputs coca_lit coca-train experiment=pretrain_b32 data.shards='/data/{00000..41455}.tar'
FROM python:3.12-slim
COPY dist/*.whl /tmp/
RUN pip install --no-cache-dir "$(ls /tmp/*.whl)[remote,kernels,tensorboard,wandb]" && rm /tmp/*.whl
WORKDIR /work
CMD ["coca-train", "--help"]
