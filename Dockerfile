# Our own server for a custom container: `docker build --platform linux/amd64 -t REGISTRY/pulse:VERSION .`
# The model is mounted at /repository; the code lies in /app.
#
# The base holds Python 3.11 and torch built for CUDA 12.8, which drivers from 525 on run, and is the image that Hugging
# Face's own guide to custom containers starts from.  Its torch is kept: another one would lie in a second layer beside it.
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime

# What launches the kernels of compiled decode steps is made by a C compiler when the server starts; the base's Python has
# its headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home pulse

WORKDIR /app

# The libraries change more rarely than the code: their layer is built, pushed and pulled once.
COPY requirements.txt requirements-serve.txt constraints.txt ./
RUN sed "/^torch==/d" constraints.txt > /tmp/constraints.txt \
    && python -m pip install --no-cache-dir --root-user-action=ignore -r requirements-serve.txt -c /tmp/constraints.txt \
    && rm /tmp/constraints.txt \
    && python -c "import torch; assert torch.version.cuda, 'torch was replaced by one without CUDA'"

COPY LICENSE generation_config.json handler.py serve.py utils.py ./
COPY commentary/ commentary/
COPY monitoring/ monitoring/
COPY pulse_ecg/ pulse_ecg/
COPY server/ server/
COPY ui/ ui/

ENV PULSE_MODEL_PATH=/repository \
    PULSE_HOST=0.0.0.0 \
    PULSE_PORT=8080 \
    HF_HOME=/home/pulse/huggingface \
    PYTHONUNBUFFERED=1

USER 10001:10001

EXPOSE 8080

# 503 while the model loads, which takes minutes where the weights are downloaded first.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; \
        r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PULSE_PORT'] + '/health')"]

# In exec form the server is process 1 and gets the signal itself: it answers what it has accepted, then ends.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "serve.py"]
