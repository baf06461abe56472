"""What every command that writes shards does: atomic, resumable, byte-reproducible.

One shard is one job, a pure function of its items and the options. Jobs run in any number of processes and in
any order, and a shard that is complete is never touched again: that makes the output the same bytes however
it came about.
"""
