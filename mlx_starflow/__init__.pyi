from mlx_starflow.errors import Cancelled as Cancelled
from mlx_starflow.errors import StarflowError as StarflowError
from mlx_starflow.model_dir.directory import load_flow as load_flow
from mlx_starflow.pipelines.class_labels import ClassPipeline as ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline as ImagePipeline
from mlx_starflow.pipelines.loading import load as load
from mlx_starflow.pipelines.loading import load_class_labels as load_class_labels
from mlx_starflow.pipelines.loading import load_video as load_video
from mlx_starflow.pipelines.results import GenerationResult as GenerationResult
from mlx_starflow.pipelines.results import GenerationSettings as GenerationSettings
from mlx_starflow.pipelines.text import TextPipeline as TextPipeline
from mlx_starflow.pipelines.text import load_text as load_text
from mlx_starflow.pipelines.upscaling import Upscaler as Upscaler
from mlx_starflow.pipelines.video import VideoPipeline as VideoPipeline
from mlx_starflow.sampling import Progress as Progress
from mlx_starflow.sampling import denoise as denoise
from mlx_starflow.sampling import sample as sample

__version__: str
