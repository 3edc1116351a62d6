//! Which files there are: names, directories and inode numbers that are never used twice.

use crate::image::{Access, Image, Opened, Source};
use crate::pieces::PieceError;
use parking_lot::RwLock;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use stillblock_core::export::Export;

/// The top directory's inode number, as FUSE has it.
pub const ROOT: u64 = 1;

/// A file to be shown: its path, of one or two names, and the ranges of the export that it has;
/// `None` for all of it.
pub type FileSpec = (String, Option<Vec<(u64, u64)>>);

/// Why a tree refused something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TreeError {
    #[error("{name}: its image is open {opens} times; unmount or detach it, or force")]
    InUse { name: String, opens: usize },
    #[error("{name}: cut off, but a request of its image has not ended in time")]
    Busy { name: String },
    #[error("{name}: has no images")]
    Unknown { name: String },
    #[error("{path}: a file of that name is shown already, or the name is none")]
    Path { path: String },
    #[error("{path}: {error}")]
    Piece { path: String, error: PieceError },
}

/// A file or directory.
#[derive(Clone)]
pub enum Node {
    /// A directory.
    Directory,
    /// A file.
    File(Arc<Image>),
}

/// A name in a directory.
type Place = (u64, String);

/// An export that is shown, and where its files and directories are.
struct Shown {
    source: Arc<Source>,
    places: Vec<Place>,
}

#[derive(Default)]
struct Inner {
    /// The last number given out.
    last: u64,
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<Place, u64>,
    exports: HashMap<String, Shown>,
}

/// The files of all exports that are shown. Thread-safe; no lock is held across I/O.
pub struct Tree(RwLock<Inner>);

impl Default for Tree {
    fn default() -> Self {
        let mut inner = Inner { last: ROOT, ..Inner::default() };
        inner.nodes.insert(ROOT, Node::Directory);
        Self(RwLock::new(inner))
    }
}

impl Inner {
    fn insert(&mut self, directory: u64, name: &str, node: Node, mine: &mut Vec<Place>) -> u64 {
        self.last += 1;
        let number = self.last;
        self.nodes.insert(number, node);
        self.names.insert((directory, name.to_owned()), number);
        mine.push((directory, name.to_owned()));
        number
    }

    fn drop_all(&mut self, mine: &[Place]) {
        for key in mine {
            if let Some(number) = self.names.remove(key) {
                self.nodes.remove(&number);
            }
        }
    }

    fn add(
        &mut self,
        source: &Arc<Source>,
        files: &[FileSpec],
        mine: &mut Vec<Place>,
    ) -> Result<(), TreeError> {
        for (path, ranges) in files {
            let refused = || TreeError::Path { path: path.clone() };
            let image = Image::new(Arc::clone(source), ranges.as_deref())
                .map_err(|error| TreeError::Piece { path: path.clone(), error })?;
            let (directory, name) = match path.split_once('/') {
                None => (ROOT, path.as_str()),
                Some((folder, name)) => {
                    if !is_name(folder) {
                        return Err(refused());
                    }
                    let number = match self.names.get(&(ROOT, folder.to_owned())) {
                        Some(&number) => number,
                        None => self.insert(ROOT, folder, Node::Directory, mine),
                    };
                    if !matches!(self.nodes.get(&number), Some(Node::Directory)) {
                        return Err(refused());
                    }
                    (number, name)
                }
            };
            if !is_name(name) || self.names.contains_key(&(directory, name.to_owned())) {
                return Err(refused());
            }
            self.insert(directory, name, Node::File(Arc::new(image)), mine);
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) && name.len() <= 255
}

impl Tree {
    /// Show an export as files; all of them, or on an error none.
    pub fn add(
        &self,
        name: &str,
        export: Arc<dyn Export>,
        access: Access,
        created_unix_ns: u64,
        files: &[FileSpec],
    ) -> Result<(), TreeError> {
        let source = Arc::new(Source::new(export, access, created_unix_ns));
        let mut inner = self.0.write();
        if inner.exports.contains_key(name) {
            return Err(TreeError::Path { path: name.to_owned() });
        }
        let mut mine = Vec::new();
        if let Err(error) = inner.add(&source, files, &mut mine) {
            inner.drop_all(&mine);
            return Err(error);
        }
        inner.exports.insert(name.to_owned(), Shown { source, places: mine });
        Ok(())
    }

    /// Show more files of an export.
    pub fn extend(&self, name: &str, files: &[FileSpec]) -> Result<(), TreeError> {
        let mut inner = self.0.write();
        let unknown = || TreeError::Unknown { name: name.to_owned() };
        let source = Arc::clone(&inner.exports.get(name).ok_or_else(unknown)?.source);
        let mut more = Vec::new();
        if let Err(error) = inner.add(&source, files, &mut more) {
            inner.drop_all(&more);
            return Err(error);
        }
        if let Some(shown) = inner.exports.get_mut(name) {
            shown.places.append(&mut more);
        }
        Ok(())
    }

    /// Take an export's files away and let go of it; return how many times they were open. Refused
    /// if they are, unless forced: then they give errors from now on.
    pub fn remove(&self, name: &str, force: bool) -> Result<usize, TreeError> {
        let mut inner = self.0.write();
        let Some(shown) = inner.exports.get(name) else {
            return Err(TreeError::Unknown { name: name.to_owned() });
        };
        // Files are opened under the lock for reading, so nobody comes in between.
        let opens = shown.source.opens();
        if opens > 0 && !force {
            return Err(TreeError::InUse { name: name.to_owned(), opens });
        }
        let Some(shown) = inner.exports.remove(name) else { return Ok(0) };
        inner.drop_all(&shown.places);
        drop(inner);
        if shown.source.end() { Ok(opens) } else { Err(TreeError::Busy { name: name.to_owned() }) }
    }

    /// How many times the files of each export are open.
    pub fn opens(&self) -> Vec<(String, usize)> {
        let inner = self.0.read();
        inner.exports.iter().map(|(name, shown)| (name.clone(), shown.source.opens())).collect()
    }

    /// The node of this number.
    pub fn node(&self, number: u64) -> Option<Node> {
        self.0.read().nodes.get(&number).cloned()
    }

    /// The file of this number.
    pub fn file(&self, number: u64) -> Option<Arc<Image>> {
        match self.0.read().nodes.get(&number) {
            Some(Node::File(image)) => Some(Arc::clone(image)),
            _ => None,
        }
    }

    /// Open the file of this number.
    pub fn open(&self, number: u64) -> Option<(Arc<Image>, Opened)> {
        let inner = self.0.read();
        match inner.nodes.get(&number) {
            Some(Node::File(image)) => {
                Some((Arc::clone(image), Opened::new(Arc::clone(image.source()))))
            }
            _ => None,
        }
    }

    /// What has this name in a directory.
    pub fn find(&self, directory: u64, name: &str) -> Option<(u64, Node)> {
        let inner = self.0.read();
        let number = *inner.names.get(&(directory, name.to_owned()))?;
        Some((number, inner.nodes.get(&number)?.clone()))
    }

    /// What a directory has beyond this number, by number: (number, name, node). Numbers only
    /// grow, so that whoever reads a directory in steps misses nothing that stays.
    pub fn list(&self, directory: u64, beyond: u64) -> Vec<(u64, String, Node)> {
        let inner = self.0.read();
        let first = (directory, String::new());
        let mut found: Vec<(u64, String, Node)> = inner
            .names
            .range(first..)
            .take_while(|((parent, _), _)| *parent == directory)
            .filter(|(_, number)| **number > beyond)
            .filter_map(|((_, name), number)| {
                Some((*number, name.clone(), inner.nodes.get(number)?.clone()))
            })
            .collect();
        found.sort_by_key(|(number, _, _)| *number);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::memory;

    fn names(tree: &Tree, directory: u64) -> Vec<String> {
        tree.list(directory, 0).into_iter().map(|(_, name, _)| name).collect()
    }

    fn monday() -> Vec<FileSpec> {
        vec![("@monday.raw".into(), None), ("@monday.parts/p1.raw".into(), Some(vec![(10, 50)]))]
    }

    #[test]
    fn files_come_and_go_with_their_export_and_numbers_are_never_used_twice() {
        let tree = Tree::default();
        tree.add("web", memory(100), Access::Watched, 0, &[("disk.raw".into(), None)]).unwrap();
        tree.add("web@monday", memory(100), Access::Constant, 0, &monday()).unwrap();
        assert_eq!(names(&tree, ROOT), ["disk.raw", "@monday.raw", "@monday.parts"]);
        let (folder, _) = tree.find(ROOT, "@monday.parts").unwrap();
        let (file, _) = tree.find(folder, "p1.raw").unwrap();
        assert_eq!(tree.file(file).unwrap().size_bytes(), 40);
        let numbers: Vec<u64> = tree.list(ROOT, 0).iter().map(|(number, _, _)| *number).collect();
        assert_eq!(tree.remove("web@monday", false), Ok(0));
        assert_eq!(names(&tree, ROOT), ["disk.raw"]);
        assert!(tree.file(file).is_none() && tree.node(folder).is_none());
        tree.add("web@monday", memory(100), Access::Constant, 0, &monday()).unwrap();
        assert!(tree.list(ROOT, 0)[1..].iter().all(|(number, _, _)| !numbers.contains(number)));
    }

    #[test]
    fn an_export_that_is_open_goes_only_by_force_and_then_gives_errors() {
        let tree = Tree::default();
        tree.add("web@monday", memory(100), Access::Constant, 0, &monday()).unwrap();
        let (number, _) = tree.find(ROOT, "@monday.raw").unwrap();
        let (image, opened) = tree.open(number).unwrap();
        let refused = TreeError::InUse { name: "web@monday".into(), opens: 1 };
        assert_eq!(tree.remove("web@monday", false), Err(refused));
        assert_eq!(image.read(0, &mut [0; 10]), Ok(10));
        assert_eq!(tree.remove("web@monday", true), Ok(1));
        assert!(image.read(0, &mut [0; 10]).is_err());
        drop(opened);
        assert!(tree.opens().is_empty());
    }

    #[test]
    fn what_cannot_be_shown_whole_is_not_shown_at_all() {
        let tree = Tree::default();
        tree.add("web@monday", memory(100), Access::Constant, 0, &monday()).unwrap();
        let before = names(&tree, ROOT);
        for path in ["@monday.raw", "", "..", "@monday.raw/x", "@monday.parts/p1.raw", "a/b/c"] {
            let files = [("@new.raw".into(), None), (path.into(), None)];
            let added = tree.add("web@new", memory(100), Access::Constant, 0, &files);
            assert_eq!(added, Err(TreeError::Path { path: path.into() }));
        }
        let past = [("@new.raw".to_owned(), None), ("x".to_owned(), Some(vec![(90, 101)]))];
        assert!(tree.add("web@new", memory(100), Access::Constant, 0, &past).is_err());
        assert_eq!(names(&tree, ROOT), before);
        tree.extend("web@monday", &[("@monday.parts/vg-root.raw".into(), None)]).unwrap();
        assert_eq!(tree.remove("web@monday", false), Ok(0));
        assert!(names(&tree, ROOT).is_empty());
    }

    #[test]
    fn a_directory_read_in_steps_misses_nothing_that_stays() {
        let tree = Tree::default();
        for day in ["monday", "tuesday", "friday"] {
            let files = [(format!("@{day}.raw"), None)];
            tree.add(day, memory(10), Access::Constant, 0, &files).unwrap();
        }
        let (first, name, _) = tree.list(ROOT, 0).remove(0);
        assert_eq!(name, "@monday.raw");
        tree.remove("monday", false).unwrap();
        let rest: Vec<String> = tree.list(ROOT, first).into_iter().map(|found| found.1).collect();
        assert_eq!(rest, ["@tuesday.raw", "@friday.raw"]);
    }
}
