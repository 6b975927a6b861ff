# NVIDIA's PyTorch image brings torch, Transformer Engine, apex and DALI that fit one another and the driver.
# Our package comes with constraints made from what the image holds, so that pip cannot replace any of it.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

WORKDIR /opt/megalong
COPY pyproject.toml README.md ./
COPY megalong/__init__.py megalong/__init__.py
RUN python -m pip freeze --exclude-editable \
      | grep -iE '^(torch|torchvision|triton|transformer.engine|apex|nvidia-[a-z0-9-]+|numpy)[ =@]' \
      | grep '==' > /opt/image-constraints.txt \
 && python -m pip install --no-cache-dir -c /opt/image-constraints.txt -e '.[dev]'
COPY . .

RUN useradd --create-home --uid 1000 megalong && chown -R megalong /opt/megalong
USER megalong
# the same suite as everywhere; `docker run --gpus all IMAGE python -m pytest` runs it
CMD ["python", "megalong/pretrain.py", "--help"]
