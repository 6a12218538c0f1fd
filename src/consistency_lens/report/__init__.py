"""Reports: what a run left, and what its lens says about some texts, as one JSON document and a page that shows it."""
