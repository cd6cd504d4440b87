"""Launch configurations of the norms of weights."""

from fastblocks.kernels.launch import config
from fastblocks.kernels.norms.tables import TILE_COLUMNS, TILE_ROWS

# 32 loads per thread in flight: a program reads all rows of its columns, and there are few programs for a narrow weight
COLUMNS = config(4, BLOCK_O=128, BLOCK_N=TILE_COLUMNS)
# 16 elements per thread; four rows a program, so that weights of 1024 rows are two waves of an H100
ROWS = config(4, BLOCK_O=TILE_ROWS, BLOCK_N=512)
