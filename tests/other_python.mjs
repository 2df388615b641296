// A newer Python than most machines have: CPython for WebAssembly, under node. Prints what the file given prints.
//     node other_python.mjs PYODIDE_FOLDER CHECKOUT PACKAGES FILE.py
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
const [pyodide, checkout, packages, file] = process.argv.slice(2);
const { loadPyodide } = await import(pathToFileURL(`${pyodide}/pyodide.mjs`));
const python = await loadPyodide({});
python.mountNodeFS("/checkout", checkout);
python.mountNodeFS("/packages", packages);
python.runPython("import sys; sys.path[:0] = ['/checkout', '/packages']");
python.runPython(readFileSync(file, "utf8"));
