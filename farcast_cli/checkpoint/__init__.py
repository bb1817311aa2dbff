"""The plan of a new checkpoint: where every byte of its files comes from, before any of them is read.

Snapshot (the origin's headers)     Advanced (counters, rates and schedules at the later step, from `state`)
     |                                   |
     +------------ Rewrite --------------+     which tensors are forecast, in which element type and shards
     |                                   |
plan.plan_outputs                   convert.plan_converted
the origin's own files              another file format, from what `contents` finds in the origin's
     |                                   |
     +-----------------+-----------------+
                       v
OutputFile             one file: name, permissions
  Section              a stretch of it with a CRC-32 of its own (all of the file, or a record of a zip)
    Piece: Fixed       bytes that are known now: a header, a pickle, JSON, a counter
           Values      a tensor to forecast, or to write in another type; the engine computes it
           Copy        bytes of one of the origin's files
           Zeros       a state that starts anew
"""
