"""OpenAI's API over HTTP: `transformers-nextflow serve`. Needs the extra `[serve]`.

- `limits.py`: what a server takes.
- `bodies.py`, `schemas.py`, `pictures.py`, `chats.py`: what requests say, and their pictures and messages.
- `jobs.py`: requests as calls of `generate`, several at once.
- `batching.py`, `streams.py`: who waits, and who is drawn together; answers as they are written.
- `app.py`, `gate.py`, `errors.py`, `metrics.py`: the web application.
- `replicas.py`: the same on Ray Serve.
"""
