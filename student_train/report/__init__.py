"""`train-student report`: one page that shows how runs went, side by side."""
