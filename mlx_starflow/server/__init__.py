"""A model that stays loaded: an HTTP server whose one worker owns the device, and the page that it serves.

A request becomes a `Job` (`jobs.py`), which waits in the bounded queue of the `Worker` (`worker.py`), a thread that
alone touches MLX and the models that are loaded (`models.py`). Event loop and worker speak through jobs: events go
out, cancelling goes in. `openai_api.py` has the endpoints that other tools know, `api.py` those that only a flow has;
both read requests (`requests.py`) into the same work (`work.py`). What is finished lies in the `Gallery`
(`gallery.py`), a folder of images that say how they were made. `security.py` decides who is heard at all, `limits.py`
how much may be asked for.

Needs the extra `serve`; nothing here is imported before `mlx-starflow serve` is called.
"""
