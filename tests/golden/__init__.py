"""Losses of ten steps of every architecture, adapter kind and way of tuning, kept, so that a change which was to change
nothing shows if it does.

    bash tests/run.sh tests/golden            equal to 1e-5, on any CPU
    python -m tests.golden                    the largest difference of each run; 0 where it is the same bit for bit, on
                                              the CPU that wrote them
    python -m tests.golden --write            keeps what comes out now: after a change that was to change it, with the
                                              reason in the commit

fp32, one process, random weights, the packs of tests/support.
"""
