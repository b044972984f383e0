"""An OpenAI-compatible endpoint over a model: ``asked`` reads a request, ``scheduler`` decodes, ``server`` runs it."""
