# docker build -t ijepa_fast .
# docker run --gpus all --ipc=host -v /data:/data -v $PWD/runs:/training/runs ijepa_fast train --config vit_small16 data.source=/data/photos
FROM python:3.12-slim
# Triton and torch.compile call a compiler while a run is under way.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
# The build of torch for the machine's driver; for a CPU: --build-arg TORCH="torch==2.13.0 --index-url .../whl/cpu". An index of
# torch's has torch and what it needs, and not what follows.
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir $TORCH
RUN pip install --no-cache-dir "setuptools>=77" wheel ninja py-cpuinfo numpy
COPY . /source
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation "/source[gpu]" && rm -r /source
WORKDIR /training
ENTRYPOINT ["ijepa-fast"]
CMD ["doctor"]
