"""`mlx-starflow serve`: models that stay loaded, behind OpenAI's API and a page in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_starflow import cpu
from mlx_starflow.cli.options.sampling import lora_option, network_options, quantize_option
from mlx_starflow.errors import StarflowError

INSTALL = "the server needs packages that are not installed: pip install fastapi uvicorn python-multipart"


@click.command()
@click.option("-m", "--model", "models", multiple=True, help="As of generate; give it again for more.  [default: demo]")
@lora_option
@click.option(
    "--student",
    "students",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A student of one of the models, which clients ask for by the folder's name; give it again for more. One that "
    "a model has in its own folder is there anyway.",
)
@click.option(
    "--upscaler",
    metavar="FILE",
    help="What enlarges pictures and videos for clients that ask for it, as --upscale-model of generate.",
)
@click.option("--host", default="127.0.0.1", help="Where to listen; other machines can reach 0.0.0.0.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 is any that is free.")
@click.option(
    "--gallery", type=click.Path(path_type=Path), default="~/mlx-starflow", help="Folder of finished pictures."
)
@click.option(
    "--api-key",
    envvar="MLX_STARFLOW_API_KEY",
    help="What clients have to send; needed unless --host is this machine alone. Better in MLX_STARFLOW_API_KEY.",
)
@click.option("--allow-host", "names", multiple=True, help="A name that the server answers to; give it again for more.")
@click.option(
    "--keep-alive", type=click.FloatRange(min=0), help="Seconds until an unused model is let go of; never by default."
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GB for models and work; what the machine has by default.",
)
@click.option("--queue", type=click.IntRange(min=1), default=16, help="Jobs that may wait.")
@click.option("--max-images", type=click.IntRange(min=1), default=10, help="Pictures that a request may ask for.")
@click.option("--max-prompt", type=click.IntRange(min=1), default=4000, help="Characters of a prompt.")
@click.option("--max-frames", type=click.IntRange(min=1), default=257, help="Frames of a video.")
@click.option("--max-body", type=click.FloatRange(min=0.01), default=32.0, help="MB of a request.")
@click.option(
    "--max-pixels", type=click.FloatRange(min=0.01), default=16.0, help="Millions of pixels of a picture that is sent."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, help="Seconds that a job may run."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    help="Seconds that a job has to finish when the server is stopped.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@network_options
@quantize_option
def serve(
    models: tuple[str, ...],
    adapters: tuple[tuple[str, float], ...],
    students: tuple[Path, ...],
    upscaler: str | None,
    host: str,
    port: int,
    gallery: Path,
    api_key: str | None,
    names: tuple[str, ...],
    keep_alive: float | None,
    memory: float | None,
    queue: int,
    max_images: int,
    max_prompt: int,
    max_frames: int,
    max_body: float,
    max_pixels: float,
    timeout: float,
    grace: float,
    log_json: bool,
    dtype: str | None,
    low_memory: bool | None,
    quantize: str | None,
) -> None:
    """Keep models loaded, and answer requests for pictures.

    \b
    mlx-starflow serve
    mlx-starflow serve --model demo --model my-model --port 8080
    mlx-starflow serve --model my-model --student my-student --upscaler RealESRGAN_x4plus.pth
    mlx-starflow serve --host 0.0.0.0 --api-key KEY

    The page is at http://127.0.0.1:8000, and OpenAI's API at http://127.0.0.1:8000/v1.
    """
    try:
        from mlx_starflow.server.run import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in (
            "fastapi",
            "starlette",
            "uvicorn",
            "pydantic",
            "h11",
            "python_multipart",
        ):
            raise StarflowError(INSTALL) from None
        raise
    from mlx_starflow.server.gallery import Gallery
    from mlx_starflow.server.limits import Limits
    from mlx_starflow.server.logs import Log
    from mlx_starflow.server.models import Models
    from mlx_starflow.server.security import Security
    from mlx_starflow.server.service import Service

    if adapters and len(models) > 1:
        raise click.UsageError("adapters fit one model: with --lora, give one --model alone")
    limits = Limits(
        queue=queue,
        images=max_images,
        body=int(max_body * 2**20),
        pixels=int(max_pixels * 2**20),
        prompt=max_prompt,
        frames=max_frames,
        timeout=timeout,
    )
    security = Security(host, api_key, names)
    cpu.hint_if_slow()
    service = Service(
        Models(
            models or ("demo",),
            memory=int((memory or 0) * 1e9),
            keep_alive=keep_alive,
            dtype=dtype,
            low_memory=low_memory,
            quantize=quantize,
            adapters=adapters,
            students=students,
            upscaler=upscaler,
        ),
        Gallery(gallery),
        limits,
        security,
        Log(as_json=log_json),
    )
    run(service, host, port, grace=grace, ready=lambda address: click.echo(f"mlx-starflow is at {address}"))
