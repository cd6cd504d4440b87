"""Launch configurations of losses."""

from fastblocks.kernels.launch import config

TILE = 8192  # elements of a program, which also looks for its map among all
MAPS = config(4, BLOCK=2048, TILE=TILE)  # 16 elements per thread and tensor
GATHER = config(4, BLOCK=1024)
