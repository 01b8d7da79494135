"""A checkpoint behind the API that OpenAI's and Mercury's clients speak: `dllm serve MODEL`.

app.py has the endpoints, guard.py what surrounds them all. A request passes through requests.py (its checks and plan),
texts.py (fields to a canvas, the canvas to text), scheduler.py (the denoising steps of all requests together) and
answers.py (whole or streamed). limits.py is what the server allows; bench.py the load generator.
"""
