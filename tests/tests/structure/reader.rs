//! Reads which file of a crate takes which name from which other.
//!
//! A name is followed through `use` to the file that defines it. What cannot be found (it is made by a
//! macro) counts as defined by the module in which it was looked for. Method calls are not followed:
//! they need no import.

use std::collections::BTreeMap;

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, Field, ImplItemFn, Item, ItemUse, Macro, Meta, UseTree, VisRestricted,
    visit::{self, Visit},
};

use crate::Tree;

/// One name that a file takes from another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    pub(crate) from: String,
    /// The file that defines it.
    pub(crate) to: String,
    pub(crate) name: String,
    /// The file of a module above `from` that hands the name on without defining it.
    pub(crate) through: Option<String>,
}

/// All imports of a crate in `folder`, which calls itself `name` where its library is used by its
/// programs.
pub(crate) fn imports(tree: &Tree, folder: &str, name: &str) -> Vec<Import> {
    let mut modules = Modules { name: name.to_owned(), by_path: BTreeMap::new() };
    for root in ["lib", "main"] {
        let file = format!("{folder}/src/{root}.rs");
        if tree.contains_key(&file) {
            let path = vec![root.to_owned()];
            let below = format!("{folder}/src");
            read(&mut modules, tree, path, &file, &below, None);
        }
    }
    modules.imports()
}

/// More than any name is handed on. `use x::x` would lead round in a ring, where `x` is another crate.
const MAX_HOPS: usize = 32;

/// A module's path, from its root: `["lib", "transport", "connection"]`.
type ModulePath = Vec<String>;

struct Modules {
    name: String,
    by_path: BTreeMap<ModulePath, Module>,
}

#[derive(Default)]
struct Module {
    file: String,
    /// What is defined in it, modules apart.
    items: Vec<String>,
    /// Names that `use` brings in, with the paths behind them.
    uses: Vec<(String, Vec<String>)>,
    /// Paths before `::*`.
    globs: Vec<Vec<String>>,
    /// Paths that occur in code.
    paths: Vec<Vec<String>>,
}

/// What a path leads to.
enum Found {
    Module(ModulePath),
    /// The module that defines it, and its name there.
    Item(ModulePath, String),
    /// Another crate, a local name, or a prelude.
    Outside,
}

/// Reads a module and those below it, from `file` or from the braces `inline`. Files of modules below are in
/// the folder `below`.
fn read(
    modules: &mut Modules,
    tree: &Tree,
    path: ModulePath,
    file: &str,
    below: &str,
    inline: Option<&[Item]>,
) {
    let parsed;
    let items = match inline {
        Some(items) => items,
        None => {
            let text = &tree[file];
            parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{file}: {error}"));
            &parsed.items
        }
    };
    let mut module = Module { file: file.to_owned(), ..Module::default() };
    for item in items {
        let Item::Mod(child) = item else {
            module.visit_item(item);
            continue;
        };
        if for_tests(&child.attrs) {
            continue;
        }
        let name = child.ident.to_string();
        let path: ModulePath = path.iter().cloned().chain([name.clone()]).collect();
        let below = format!("{below}/{name}");
        if let Some((_, items)) = &child.content {
            read(modules, tree, path, file, &below, Some(items));
        } else {
            let files = [format!("{below}.rs"), format!("{below}/mod.rs")];
            let found = files.iter().find(|file| tree.contains_key(*file));
            let found = found.unwrap_or_else(|| panic!("{file}: no file of the module {name}"));
            read(modules, tree, path, found, &below, None);
        }
    }
    modules.by_path.insert(path, module);
}

impl<'ast> Visit<'ast> for Module {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = match item {
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            Item::Impl(item) => (&item.attrs, None),
            Item::Use(item) => (&item.attrs, None),
            _ => return,
        };
        if !for_tests(attributes) {
            self.items.extend(name.map(ToString::to_string));
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        if !for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_field(&mut self, field: &'ast Field) {
        if !for_tests(&field.attrs) {
            visit::visit_field(self, field);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.add_uses(&mut vec![], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    /// `pub(in path)` imports nothing.
    fn visit_vis_restricted(&mut self, _: &'ast VisRestricted) {}

    fn visit_macro(&mut self, invocation: &'ast Macro) {
        self.add_paths_in(invocation.tokens.clone());
        visit::visit_macro(self, invocation);
    }
}

impl Module {
    fn add_uses(&mut self, prefix: &mut Vec<String>, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.add_uses(prefix, &path.tree);
                prefix.pop();
            }
            UseTree::Name(name) => self.add_use(prefix, &name.ident.to_string(), None),
            UseTree::Rename(name) => {
                self.add_use(prefix, &name.ident.to_string(), Some(name.rename.to_string()));
            }
            UseTree::Glob(_) => self.globs.push(prefix.clone()),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_uses(prefix, tree));
            }
        }
    }

    fn add_use(&mut self, prefix: &[String], name: &str, rename: Option<String>) {
        let mut path = prefix.to_vec();
        if name != "self" || path.is_empty() {
            path.push(name.to_owned());
        }
        let name = rename.or_else(|| path.last().cloned()).unwrap_or_default();
        self.uses.push((name, path));
    }

    /// The paths in the tokens of a macro's invocation.
    fn add_paths_in(&mut self, tokens: TokenStream) {
        let (mut path, mut colons) = (vec![], 0);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 && !path.is_empty() {
                        self.paths.push(std::mem::take(&mut path));
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    self.paths.extend((!path.is_empty()).then(|| std::mem::take(&mut path)));
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.add_paths_in(group.stream());
                    }
                }
            }
        }
        self.paths.extend((!path.is_empty()).then_some(path));
    }
}

impl Modules {
    fn imports(&self) -> Vec<Import> {
        let mut imports = vec![];
        for (at, module) in &self.by_path {
            let uses = module.uses.iter().map(|(_, path)| path);
            for path in uses.chain(&module.paths) {
                let mut through = vec![];
                if let Found::Item(definer, name) = self.follow(at, path, &mut through) {
                    let to = &self.by_path[&definer].file;
                    let is_above = |face: &&ModulePath| {
                        face.len() < at.len()
                            && at.starts_with(face)
                            && self.by_path[*face].file != module.file
                    };
                    let face = through.iter().find(is_above).map(|face| &self.by_path[face].file);
                    imports.push(Import {
                        from: module.file.clone(),
                        to: to.clone(),
                        name,
                        through: face.filter(|face| *face != to).cloned(),
                    });
                }
            }
        }
        imports.sort_unstable();
        imports.dedup();
        imports
    }

    /// Where `path`, written in the module `at`, leads; modules whose `use` it passed are added to `through`.
    fn follow(&self, at: &ModulePath, path: &[String], through: &mut Vec<ModulePath>) -> Found {
        let (mut here, mut rest) = (at.clone(), path);
        let mut is_start = true;
        while let Some((first, others)) = rest.split_first() {
            match &**first {
                "crate" => here.truncate(1),
                "self" => {}
                "super" => {
                    here.pop();
                }
                first
                    if is_start
                        && first == self.name
                        && self.by_path.contains_key(&["lib".to_owned()][..]) =>
                {
                    here = vec!["lib".to_owned()];
                }
                name => match self.look_up(&here, name, is_start, through) {
                    Found::Module(module) => here = module,
                    found => return found,
                },
            }
            (rest, is_start) = (others, false);
        }
        Found::Module(here)
    }

    /// What `name` is in the module `at`. In the first place of a path it may be something from outside.
    fn look_up(
        &self,
        at: &ModulePath,
        name: &str,
        is_start: bool,
        through: &mut Vec<ModulePath>,
    ) -> Found {
        if through.len() > MAX_HOPS {
            return Found::Outside;
        }
        let child: ModulePath = at.iter().cloned().chain([name.to_owned()]).collect();
        if self.by_path.contains_key(&child) {
            return Found::Module(child);
        }
        let module = &self.by_path[at];
        if module.items.iter().any(|item| item == name) {
            return Found::Item(at.clone(), name.to_owned());
        }
        if let Some((_, path)) =
            module.uses.iter().find(|(used, path)| used == name && path[..] != [name])
        {
            through.push(at.clone());
            return self.follow(at, path, through);
        }
        for glob in &module.globs {
            let before = through.len();
            through.push(at.clone());
            if let Found::Module(target) = self.follow(at, glob, through)
                && target != *at
                && let found @ (Found::Module(_) | Found::Item(..)) =
                    self.look_up(&target, name, true, through)
            {
                return found;
            }
            through.truncate(before);
        }
        if is_start { Found::Outside } else { Found::Item(at.clone(), name.to_owned()) }
    }
}

/// Whether something is compiled for tests alone.
fn for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => wants_tests(list.tokens.clone()),
        meta => meta.path().segments.last().is_some_and(|segment| segment.ident == "test"),
    })
}

/// Whether `test` occurs in a condition, outside of `not(…)`.
fn wants_tests(condition: TokenStream) -> bool {
    let mut negated = false;
    condition.into_iter().any(|token| match token {
        TokenTree::Ident(ident) => {
            negated = ident == "not";
            ident == "test"
        }
        TokenTree::Group(group) => !negated && wants_tests(group.stream()),
        _ => false,
    })
}
