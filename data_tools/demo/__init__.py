"""A small real multi-task set made on the spot: pictures, H.264 clips and texts that a tiny model can learn in minutes.

An example is first a specification (plain frozen data, cheap), then files. Whether a specification may be used for training or is
held out follows from its own hash, so the two parts are disjoint by construction, whatever the seed.

    pictures.py   scenes of shapes and lettering, and how they are drawn
    clips.py      short clips made of shots, and how they are encoded
    sampling.py   random canvases, colours and boxes that say nothing about an answer
    picture_tasks.py, clip_tasks.py, text_tasks.py   questions with one exact answer each
    tasks.py      the mix, and the examples of a part of the set
    tokenizer.py  a 1,024-token tokenizer with Keye's special tokens
    build.py      examples -> folder, all or nothing
    preview.py    a contact sheet to look at
"""
