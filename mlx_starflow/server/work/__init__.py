"""What jobs compute: each function here makes the work of a job, which the worker's thread then calls, of a request.

Results are plain values. Images go into the gallery as soon as each is finished, and watchers are told.
"""

from mlx_starflow.server.work.edits import inpaint, interpolate, reprompt, vary
from mlx_starflow.server.work.looking import classify, decode, encode, score
from mlx_starflow.server.work.making import generate, video
from mlx_starflow.server.work.parts import Work

__all__ = [
    "Work",
    "classify",
    "decode",
    "encode",
    "generate",
    "inpaint",
    "interpolate",
    "reprompt",
    "score",
    "vary",
    "video",
]
