"""Captioned images from wherever they are: folders, tar shards, the Hugging Face `datasets` library."""

from mlx_starflow.media.sources.find import open_source as open_source
from mlx_starflow.media.sources.sample import Sample as Sample
from mlx_starflow.media.sources.sample import Skip as Skip
from mlx_starflow.media.sources.sample import Source as Source
from mlx_starflow.media.sources.sample import repeats_of as repeats_of
from mlx_starflow.media.sources.sample import skip_report as skip_report
from mlx_starflow.media.sources.sample import split_of as split_of
from mlx_starflow.media.sources.sample import write_skips as write_skips
