"""An OpenAI-compatible endpoint over a loaded model: ``scheduler`` decodes, ``text`` shows it, ``api`` speaks HTTP."""
