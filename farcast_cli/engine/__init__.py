"""The one pass that writes a forecast checkpoint: planned from headers alone, invisible until it is whole.

How bytes travel, from the plan to the disk:

    OutputFile > Section > Piece    the plan of a file (`checkpoint`): Fixed, Zeros, Copy, or Values to compute
        |  Placed                   the same, with each piece's first byte in the file
        v
    Range                           8 MiB of the file: the task that a Worker takes (a thread or a process per core)
        |-- Fixed, Zeros ---------------------------------------------------------> Buffer   (one for each horizon)
        |-- Copy ----> Reader ----------------------------------------------------> Buffer
        |-- Values --> Segment      the elements of one piece that lie in the range
        |              Batch        neighbours of one type, 262,144 elements at most
        |              Compute      Reader -> widen -> + Coefficients -> narrow ---> Buffer
        |                           (all at once in the compiled kernel, `native`; or each snapshot in turn in
        |                           `casts`, `arithmetic` or `device`, `casts`)
        v
    OutputFiles                     write the Buffers past the page cache, while the worker fills its other Buffers
        v
    Filled                          Counts, which add up; Checksums, which are combined to each Section's CRC-32
"""
