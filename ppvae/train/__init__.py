"""How a pair is trained: ``svi`` takes one step, ``fit`` many.

Around them: ``sources`` (where a batch is cut), ``processes``, ``optimizer``, ``callbacks``,
``history``; ``run`` and ``checkpoint`` (how far a run is, and the files it goes on from);
``refusals`` (what is refused before the first step); ``alternate`` (model and guide in turn).
A room that may use pairs, estimators, checks, graphs and data, and neither models nor guides.
"""
