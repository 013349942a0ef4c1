"""Looking into finished policies: what each token was worth to them, and how else they may be decoded."""
