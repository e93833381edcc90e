"""Decoding of images and videos on other machines than those that train, bit for bit as it is done locally.

1. `protocol`, `auth`, `roots`: what may be asked, by whom, of which files.
2. `worker`, `decode`: a process that decodes one request at a time and may die of it; `events`: what it and the server log.
3. `slabs`, `results`, `pool`, `connection`, `metrics`, `front`: the server, which never decodes and does not import torch; `several` of
   them.
4. `registry`, `fleet`, `server_times`, `buffers`, `attempts`, `client`, `remote`: the training side, with the local decoder as its last
   resort.
"""
