"""How a pair is trained: ``svi`` takes one step, ``fit`` many, ``many`` those of several pairs.

Around them: ``sources`` (where a batch is cut) and ``reader`` (ahead of time); ``run``,
``checkpoint`` and ``interrupt`` (how far a run is, the files it goes on from, Ctrl-C); ``refusals``
(what is refused before the first step); ``processes``, ``optimizer``, ``fused_adam``,
``callbacks``, ``history``, ``histories``; ``alternate`` (model and guide in turn); ``beside`` (what
has a loss of its own); ``ex_post`` (a prior for codes that are there). This room uses pairs,
estimators, checks, graphs and data, but neither models nor guides.
"""
