"""Images, from where they lie to batches."""

from rotjax.data.pixels import square as square
from rotjax.data.sources import load as load
