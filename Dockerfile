# The wheel with what a training job needs. Build one wheel first: rm -f dist/*.whl && python -m build --wheel
#   docker build -t coca_lit .
# Data workers send batches through /dev/shm, of which Docker gives 64 MB: hence --ipc=host (or --shm-size=16g).
#   docker run --gpus all --ipc=host -v /data:/data -v $PWD/outputs:/work/outputs coca_lit coca-train experiment=pretrain_b32 data.shards='/data/{00000..41455}.tar'
FROM python:3.12-slim
COPY dist/*.whl /tmp/
RUN pip install --no-cache-dir "$(ls /tmp/*.whl)[remote,tensorboard,wandb]" && rm /tmp/*.whl
WORKDIR /work
CMD ["coca-train", "--help"]
