"""What a training is made of; train_sr.py puts it together.

| file | what it owns |
|---|---|
| settings | every setting, its YAML file, and what is refused before any work |
| pictures, hold_out | data sets, and which of their pictures are kept for validation |
| crops | crop k of a run, a function of (seed, k) |
| teacher | a strong network's answers as targets |
| objectives, distances, draws | what is minimised, by which distance, at which times and with which noise |
| trainable, optimizers, averages | the weights that are trained, how, and their moving average |
| strategies, interruptions | several processes: who holds which weights, and when all stop |
| checkpoints | what a run goes on from |
| validation, record | what a run shows of itself |
"""
