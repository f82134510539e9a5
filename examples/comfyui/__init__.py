"""Nodes for ComfyUI that load a flow, generate, score and re-prompt.

Copy or link this folder into ComfyUI's `custom_nodes`, install mlx-starflow into ComfyUI's Python, and start it again:
the nodes are under "mlx-starflow".
"""

from .nodes import Generate, Load, Reprompt, Score

NODE_CLASS_MAPPINGS = {
    "StarflowLoad": Load,
    "StarflowGenerate": Generate,
    "StarflowScore": Score,
    "StarflowReprompt": Reprompt,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StarflowLoad": "Load a flow",
    "StarflowGenerate": "Generate with a flow",
    "StarflowScore": "Score with a flow",
    "StarflowReprompt": "Re-prompt with a flow",
}
