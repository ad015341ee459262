//! Checks the graph of imports between source files: there is no circle, and the wings (subfolders) of `image/` use
//! each other in one direction only.
//!
//! An edge leads from a file to the file that *defines* the name it uses. A re-export (`pub use`) is followed to the
//! definition and makes no edge by itself, so a `mod.rs` may offer the names of its children. Code under `#[cfg(test)]`
//! is left out: unit tests import the code that they test.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree, Visibility};

/// The wings of each floor, lowest first. A file of one wing may use files of the same wing and of lower wings.
const WINGS: &[(&str, &[&str])] = &[("image", &["image", "image/write", "image/check", "image/offline"])];

#[test]
fn no_files_import_each_other_in_a_circle() {
    let edges = SourceTree::of_crate().edges();
    let circles = circles(&edges);
    let inside = |(from, to): &(String, String)| circles.iter().any(|files| files.contains(from) && files.contains(to));
    let names: Vec<String> = edges
        .iter()
        .filter(|(edge, _)| inside(edge))
        .map(|((a, b), name)| format!("  {a} uses {name} of {b}"))
        .collect();
    assert!(
        circles.is_empty(),
        "files that import each other in a circle:\n{}\n{}",
        circles.join("\n"),
        names.join("\n")
    );
}

#[test]
fn wings_use_lower_wings_only() {
    let mut bad = Vec::new();
    for ((from, to), name) in SourceTree::of_crate().edges() {
        for (floor, wings) in WINGS {
            let wing = |file: &str| {
                let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
                let inside = |wing: &&str| folder == *wing || folder.starts_with(&format!("{wing}/"));
                wings.iter().rposition(inside).filter(|_| file.starts_with(&format!("{floor}/")))
            };
            if let (Some(user), Some(used)) = (wing(&from), wing(&to))
                && used > user
            {
                bad.push(format!("{from} uses {name} of {to}"));
            }
        }
    }
    assert!(bad.is_empty(), "wings that use a higher wing:\n{}", bad.join("\n"));
}

/// Tests the check itself on four small trees. Three have a circle through a re-export: by an import, a path in a
/// function, and a path in the argument of a macro. In the fourth only a unit test would close the circle.
#[test]
fn a_circle_through_a_re_export_is_found() {
    let tree = |b: &str| {
        let mut tree = SourceTree::default();
        tree.add_file("lib.rs", &[], "mod a; mod b; pub use a::One;", &mut |_| ());
        tree.add_file("a.rs", &["a"], "use crate::b::Two; pub struct One(Two);", &mut |_| ());
        tree.add_file("b.rs", &["b"], b, &mut |_| ());
        circles(&tree.edges())
    };
    assert_eq!(tree("use crate::One; pub struct Two(Option<Box<One>>);"), ["a.rs, b.rs"]);
    assert_eq!(tree("pub struct Two; fn f() { crate::One; }"), ["a.rs, b.rs"]);
    assert_eq!(tree("pub struct Two; fn f() { dbg!(crate::One); }"), ["a.rs, b.rs"]);
    assert_eq!(tree("pub struct Two; #[cfg(test)] mod tests { use crate::One; }"), [""; 0]);
}

/// All modules of the crate.
#[derive(Default)]
struct SourceTree {
    modules: HashMap<Vec<String>, Module>,
}

/// A module: its file, the paths for which its names stand, and the paths that it uses.
#[derive(Default)]
struct Module {
    file: String,
    /// Names that `use` declarations import, each with its path.
    imported: HashMap<String, Vec<String>>,
    /// Paths of `use ...::*`.
    globs: Vec<Vec<String>>,
    /// Imports that are visible outside the module.
    re_exported: BTreeSet<String>,
    /// Every path in the code, as written.
    used: Vec<Vec<String>>,
}

impl SourceTree {
    fn of_crate() -> SourceTree {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut tree = SourceTree::default();
        let mut open: Vec<(PathBuf, Vec<String>)> = vec![(root.join("lib.rs"), Vec::new())];
        while let Some((path, module)) = open.pop() {
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let file = path.strip_prefix(&root).expect("below src").display().to_string();
            let names: Vec<&str> = module.iter().map(String::as_str).collect();
            let is_folder = path.ends_with("mod.rs") || path.ends_with("lib.rs");
            let folder =
                if is_folder { path.parent().expect("a folder").to_path_buf() } else { path.with_extension("") };
            tree.add_file(&file, &names, &text, &mut |child| {
                let flat = folder.join(format!("{child}.rs"));
                let file = if flat.exists() { flat } else { folder.join(child).join("mod.rs") };
                open.push((file, [module.clone(), vec![child.to_owned()]].concat()));
            });
        }
        assert!(tree.modules.len() > 100, "the walk found only {} modules", tree.modules.len());
        tree
    }

    /// Adds a file and its inline modules; calls `child` with the name of each module that has a file of its own.
    fn add_file(&mut self, file: &str, module: &[&str], text: &str, child: &mut dyn FnMut(&str)) {
        let parsed = syn::parse_file(text).unwrap_or_else(|e| panic!("{file}: {e}"));
        let path = module.iter().map(|name| (*name).to_owned()).collect();
        self.add_items(file, path, &parsed.items, child);
    }

    fn add_items(&mut self, file: &str, path: Vec<String>, items: &[Item], child: &mut dyn FnMut(&str)) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        for item in items {
            match item {
                Item::Mod(inner) if is_test(&inner.attrs) => {}
                Item::Mod(inner) => {
                    let name = inner.ident.to_string();
                    match &inner.content {
                        Some((_, items)) => self.add_items(file, [path.clone(), vec![name]].concat(), items, child),
                        None => child(&name),
                    }
                }
                Item::Use(found) if !is_test(&found.attrs) => {
                    let public = !matches!(found.vis, Visibility::Inherited);
                    module.add_use(&found.tree, &mut Vec::new(), public);
                }
                other => module.visit_item(other),
            }
        }
        self.modules.insert(path, module);
    }

    /// Returns the edges from file to file, each with one of the names that cause it.
    fn edges(&self) -> BTreeMap<(String, String), String> {
        let mut edges = BTreeMap::new();
        for (place, module) in &self.modules {
            let private = module.imported.iter().filter(|(name, _)| !module.re_exported.contains(*name));
            let paths = private.map(|(_, path)| path).chain(&module.globs).chain(&module.used);
            for path in paths {
                if let Some(file) = self.file_of(place, path, 0)
                    && file != module.file
                {
                    edges.entry((module.file.clone(), file)).or_insert_with(|| path.join("::"));
                }
            }
        }
        edges
    }

    /// Returns the file that defines the item to which `path` refers in the module at `place`, or `None` if the item is
    /// of another crate.
    fn file_of(&self, place: &[String], path: &[String], depth: u32) -> Option<String> {
        if depth > 20 {
            return None;
        }
        let (mut here, mut rest) = (place.to_vec(), path);
        match path.first()?.as_str() {
            "crate" => (here, rest) = (Vec::new(), &path[1..]),
            "self" => rest = &path[1..],
            "super" => {
                while rest.first().is_some_and(|name| name == "super") {
                    here.pop();
                    rest = &rest[1..];
                }
            }
            first => {
                let module = self.modules.get(place)?;
                let child = [place.to_vec(), vec![first.to_owned()]].concat();
                if !self.modules.contains_key(&child) && !module.imported.contains_key(first) && depth == 0 {
                    return None;
                }
            }
        }
        while let Some((name, after)) = rest.split_first() {
            let child = [here.clone(), vec![name.clone()]].concat();
            if self.modules.contains_key(&child) {
                (here, rest) = (child, after);
                continue;
            }
            let module = self.modules.get(&here)?;
            if let Some(target) = module.imported.get(name) {
                let target = [target.as_slice(), after].concat();
                return if target == path { None } else { self.file_of(&here, &target, depth + 1) };
            }
            let through_glob = |glob: &Vec<String>| {
                let target = [glob.as_slice(), rest].concat();
                self.file_of(&here, &target, depth + 1)
            };
            return module.globs.iter().find_map(through_glob).or_else(|| Some(module.file.clone()));
        }
        self.modules.get(&here).map(|module| module.file.clone())
    }
}

impl Module {
    fn add_use(&mut self, tree: &UseTree, prefix: &mut Vec<String>, public: bool) {
        let mut add = |name: String, path: Vec<String>| {
            if public {
                self.re_exported.insert(name.clone());
            }
            self.imported.insert(name, path);
        };
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.add_use(&path.tree, prefix, public);
                prefix.pop();
            }
            UseTree::Name(name) if name.ident == "self" => {
                add(prefix.last().expect("a module before `self`").clone(), prefix.clone());
            }
            UseTree::Name(name) => add(name.ident.to_string(), [prefix.as_slice(), &[name.ident.to_string()]].concat()),
            UseTree::Rename(name) => {
                add(name.rename.to_string(), [prefix.as_slice(), &[name.ident.to_string()]].concat());
            }
            UseTree::Glob(_) => self.globs.push(prefix.clone()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_use(tree, prefix, public)),
        }
    }

    /// Collects paths in the arguments of macros, which are not parsed.
    fn add_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.used.extend((!path.is_empty()).then(|| std::mem::take(&mut path)));
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => self.add_tokens(group.stream()),
                _ => colons = 0,
            }
        }
        self.used.extend((!path.is_empty()).then_some(path));
    }
}

impl<'a> Visit<'a> for Module {
    fn visit_item(&mut self, item: &'a Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        // The item is a `use` inside a function.
        self.add_use(&item.tree, &mut Vec::new(), false);
    }

    fn visit_impl_item_fn(&mut self, function: &'a syn::ImplItemFn) {
        if !is_test(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_visibility(&mut self, _: &'a Visibility) {
        // `pub(super)` names a module and uses nothing of it.
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.used.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, found: &'a syn::Macro) {
        self.add_tokens(found.tokens.clone());
        visit::visit_macro(self, found);
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Returns whether an item exists in unit tests only.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) => {
            let condition = list.tokens.to_string().replace(' ', "");
            list.path.is_ident("cfg") && (condition == "test" || condition.starts_with("all(test,"))
        }
        other => other.path().is_ident("test"),
    })
}

/// Returns the groups of files that reach each other, each as one line.
fn circles(edges: &BTreeMap<(String, String), String>) -> Vec<String> {
    let mut next: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in edges.keys() {
        next.entry(from).or_default().push(to);
    }
    let reach = |start: &str| {
        let mut seen = BTreeSet::new();
        let mut open = vec![start.to_owned()];
        while let Some(file) = open.pop() {
            for to in next.get(file.as_str()).into_iter().flatten() {
                if seen.insert((*to).to_owned()) {
                    open.push((*to).to_owned());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<String>> = next.keys().map(|file| (*file, reach(file))).collect();
    let together = |a: &str| {
        let both = |b: &&String| reached.get(b.as_str()).is_some_and(|back| back.contains(a));
        reached[a].iter().filter(both).cloned().collect::<Vec<String>>()
    };
    let groups: BTreeSet<Vec<String>> =
        next.keys().map(|file| together(file)).filter(|group| !group.is_empty()).collect();
    groups.iter().map(|group| group.join(", ")).collect()
}
