"""A checkpoint behind the API that OpenAI's and Mercury's clients speak: `dllm serve MODEL`.

scheduler.py computes the denoising steps of all requests together; texts.py turns a request's fields into a canvas and
the canvas into text; app.py is the HTTP surface; page.html the page at /; bench.py the load generator.
"""
