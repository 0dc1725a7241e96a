"""Many runs from one file: which ones (`schema`), equal on one axis (`match`), as long as a budget lasts (`plan`), trained
one after another (`runs`)."""
