"""Who is resident: the planner, one actor for each model, and the ledger of memory between them."""
