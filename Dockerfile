# lemoe on a CPU:
#   docker build -t lemoe .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" -v lemoe:/cache lemoe edit edits.jsonl --model llama
#   docker run --rm -p 8000:8000 -v "$PWD:/data" -v lemoe:/cache lemoe serve --model llama --adaptor edits.lemoe --host 0.0.0.0
FROM python:3.12-slim AS build
WORKDIR /src
COPY constraints.txt ./
# The CPU build of torch (2.13.0+cpu comes before 2.13.0); others bring CUDA, several GB.
RUN python -m venv /opt/lemoe \
    && /opt/lemoe/bin/pip install --no-cache-dir -c constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY lemoe lemoe
COPY lemoe_cli lemoe_cli
RUN /opt/lemoe/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.12-slim
COPY --from=build /opt/lemoe /opt/lemoe
# Any user may write the cache of models; HOME is a folder that every user has.
RUN mkdir -m 1777 /cache
ENV PATH=/opt/lemoe/bin:$PATH LEMOE_CACHE=/cache/lemoe HF_HOME=/cache/huggingface HOME=/tmp
VOLUME /cache
WORKDIR /data
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["lemoe"]
CMD ["--help"]
