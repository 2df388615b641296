"""Parts of the parameter-golf harness. Nothing here prints, reads argv or keeps module state."""
