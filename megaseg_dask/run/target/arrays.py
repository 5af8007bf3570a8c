"""The images of a run at its target: where their groups and arrays are, and how they are made.

A target is one image, or a plate of many. Until a run is published its groups
carry the run's mark alone, so no reader can take a part for the whole.
Removing touches only the groups and arrays that the run itself would write.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import PurePosixPath

from megaseg_dask.algorithms.components import label_dtype
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.ngff.group import (
    PROVENANCE,
    find_attributes,
    remove_damaged_group,
    write_group,
)
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.labels import labels_group, remove_labels
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.ngff.volume import (
    Volume,
    is_array_of,
    is_shorter_array_of,
    restore_array,
)
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.stores import METADATA, Location

# Labels before the scores that they belong to: a reader that sees the image then sees all of it.
_ORDER = ("mask", "labels", "scores")
_DOCUMENTS = (*METADATA, ".zmetadata")
# The endings of the tables of a label image: of its objects, and of the regions they lie in.
_TABLES = ("", "_regions")


@dataclass(frozen=True, slots=True)
class Group:
    """An image of scores, or a label image, of one field.

    ``suffix`` is that of its channel, if it is a label image; ``image`` is the image that it is,
    or belongs to.
    """

    kind: str
    image: Location
    name: str
    suffix: str

    @property
    def is_label(self) -> bool:
        """Return whether it is a label image."""
        return self.kind != "scores"

    @property
    def location(self) -> Location:
        """Return where its levels are."""
        return self.image / f"labels/{self.name}" if self.is_label else self.image


class ImageTarget:
    """One image of a target: a field of a plate, or the target itself."""

    def __init__(self, plan: Plan, path: str) -> None:
        """Describe the image at ``path`` below the target; nothing is read."""
        self.path = path
        self.location = plan.target / path
        self.labels = labels_group(self.location)
        self._plan = plan

    @property
    def measured_groups(self) -> list[Group]:
        """The label images of objects: those that have measurements."""
        return [group for group in self.groups if group.kind == "labels"]

    @property
    def tables(self) -> list[Location]:
        """The groups of the tables of the image."""
        if not self._plan.resolved.measures_objects():
            return []
        endings = _TABLES if self._plan.resolved.regions else ("",)
        names = [group.name + ending for group in self.measured_groups for ending in endings]
        return [self.tables_group / name for name in names]

    @property
    def tables_group(self) -> Location:
        """The group that lists the tables of the image."""
        return self.location / "tables"

    def other_tables(self) -> set[str]:
        """Return the names of the tables that the run neither writes nor removes."""
        ours = {group.name + ending for group in self.measured_groups for ending in _TABLES}
        return folders(self.tables_group) - ours

    @cached_property
    def groups(self) -> list[Group]:
        """What a run writes of the image."""
        groups = []
        for kind in sorted(self._plan.arrays, key=_ORDER.index):
            suffixes = ("",) if kind == "scores" else self._plan.suffixes
            groups += [self.group(kind, suffix) for suffix in suffixes]
        return groups

    @property
    def label_groups(self) -> list[Group]:
        """The label images among the groups, masks included."""
        return [group for group in self.groups if group.is_label]

    def group(self, kind: str, suffix: str) -> Group:
        """Return the group of a kind; that of labels also by the suffix of its channel."""
        name = self._plan.resolved.label_name + suffix
        if kind == "mask":
            name += "_mask"
        return Group(kind, self.location, name, suffix)

    @property
    def nodes(self) -> list[Location]:
        """The groups and arrays that a run makes of the image."""
        groups = [group.location for group in self.groups]
        levels = range(len(self._plan.target_image.levels))
        nodes = list(groups)
        for group in groups:
            nodes += [group / str(level) for level in levels]
        if self.label_groups:
            nodes.append(self.labels)
        return nodes

    def metadata_of(self, group: Group) -> Image:
        """Return the metadata of a group: of labels, those of the scores without channels."""
        image = self._plan.target_image_at(self.path)
        return image.without_channels() if group.is_label else image

    def create(self, mark: dict[str, str]) -> None:
        """Create the groups, with a mark, and the empty arrays.

        Arrays in a group without a mark would be another program's: after a power loss too.

        Raises:
            StoreError: The store failed.
        """
        version = self._plan.target_image.version
        for group in self.groups:
            if group.is_label:
                write_group(self.labels, version, {})
            if group.is_label or not self._plan.adds_labels:
                write_group(group.location, version, {PROVENANCE: mark})
        self.location.sync()
        for group in self.groups:
            self._create_arrays(group)

    def _create_arrays(self, group: Group, *, keeps_times: bool = False) -> None:
        """Create the arrays of a group, or what is lost or damaged of their metadata.

        With ``keeps_times``, arrays stay that have fewer timepoints than are planned.
        """
        image = self.metadata_of(group)
        dtype = self._dtype_of(group)
        # The finest level last: whoever finds a timepoint there finds it in the others too.
        for level in reversed(range(len(image.levels))):
            array = group.location / str(level)
            layout = self._plan.layout(level)
            if not (keeps_times and is_shorter_array_of(array, image, level, dtype, layout)):
                restore_array(array, image, level, dtype, layout)

    def show_times(self, group: Group) -> None:
        """Let the arrays of a group have all timepoints that are planned, which are written.

        Raises:
            StoreError: The store failed.
        """
        self._create_arrays(group)

    def find_lost_array(self) -> Location | None:
        """Return an array whose metadata are not as they were written; ``None`` if all are."""
        for group in self.groups:
            image = self.metadata_of(group)
            dtype = self._dtype_of(group)
            for level in range(len(image.levels)):
                array = group.location / str(level)
                if not is_array_of(array, image, level, dtype, self._plan.layout(level)):
                    return array
        return None

    def _dtype_of(self, group: Group) -> str:
        dtypes = {
            "scores": self._plan.resolved.scores_dtype,
            "mask": "uint8",
            "labels": str(label_dtype(self._plan.volume_shape)),
        }
        return dtypes[group.kind]

    def restore(self) -> None:
        """Write again what is lost or damaged of the metadata of a run's groups and arrays.

        Raises:
            StoreError: The store failed.
        """
        version = self._plan.target_image.version
        self.remove_damaged(version)
        for group in self.groups:
            if group.is_label:
                write_group(self.labels, version, {})
            self._create_arrays(group, keeps_times=self._plan.grows)

    def remove_damaged(self, version: str) -> None:
        """Remove damaged metadata of the run's own groups, as one version stores them.

        Raises:
            StoreError: The store failed.
        """
        groups = [group.location for group in self.groups if group.is_label]
        groups += self.tables
        if not self._plan.adds_labels:
            # The group of the image is ours also if it holds labels alone.
            groups.append(self.location)
            groups += [self.labels] if self.label_groups else []
            groups += [self.tables_group] if self.tables else []
        for group in groups:
            remove_damaged_group(group, version)

    def is_created(self) -> bool:
        """Return whether all groups carry a mark or a provenance.

        Raises:
            StoreError: The store failed.
        """
        found = [find_attributes(group.location) or {} for group in self.groups]
        return all(PROVENANCE in attributes for attributes in found)

    def read_metadata(self) -> dict[str, bytes]:
        """Return the metadata objects of all nodes, by key below the image."""
        objects = {}
        for node in self.nodes:
            for name in METADATA:
                data = node.get(name)
                if data is not None:
                    key = f"{node.url}/{name}".removeprefix(f"{self.location.url}/")
                    objects[key] = data
        return objects

    def sweep(self) -> None:
        """Remove what writers of the labels left in a source that were killed."""
        for group in self.label_groups:
            group.location.sweep_partial()
            (self.tables_group / group.name).sweep_partial()
        for folder in (self.location, self.labels, self.tables_group):
            folder.sweep_staged(_DOCUMENTS)

    def remove_arrays(self) -> None:
        """Remove the numbered arrays of the groups; all else stays."""
        for group in self.groups:
            for name in filter(str.isdigit, group.location.children()):
                (group.location / name).remove()

    def remove_groups(self) -> None:
        """Remove what the run would write of the image, now that it has no arrays."""
        for group in self.groups:
            if group.is_label:
                group.location.remove()
                continue
            for name in METADATA:
                group.location.delete(name)
        if not self.label_groups:
            return
        if folders(self.labels) or self._plan.is_in_place:
            ours = {group.name for group in self.label_groups}
            remove_labels(self.location, self._plan.target_image.version, ours)
        else:
            # It may be of another version than the run.
            self.labels.remove()


class Target:
    """All images of a run at its target."""

    def __init__(self, plan: Plan, chosen: Collection[str] | None = None) -> None:
        """Describe the target of a plan, or ``chosen`` images of it; nothing is read."""
        self.plan = plan
        self._chosen = chosen
        self.location = plan.target
        self.version = plan.target_image.version

    @cached_property
    def is_in_place(self) -> bool:
        """Whether labels go into images whose own groups are not ours: a source, or scores."""
        return self.plan.adds_labels

    @property
    def is_whole_plate(self) -> bool:
        """Whether the run writes the groups of a plate, and not only into its fields."""
        return self.plan.plate is not None and not self.is_in_place

    @cached_property
    def images(self) -> list[ImageTarget]:
        """The fields of a plate, or the one image that is the target itself."""
        paths = dict.fromkeys(volume.image for volume in self.plan.volumes)
        chosen = paths if self._chosen is None else self._chosen
        return [ImageTarget(self.plan, path) for path in paths if path in chosen]

    @property
    def paths(self) -> set[str]:
        """The paths of all images below the target."""
        return {image.path for image in self.images}

    def iter_groups(self) -> Iterator[Group]:
        """Yield all groups that the run writes, image by image."""
        for image in self.images:
            yield from image.groups

    def iter_labels(self) -> Iterator[Group]:
        """Yield the label images of objects: those that have measurements."""
        return chain.from_iterable(image.measured_groups for image in self.images)

    @property
    def marked(self) -> list[Location]:
        """The groups that carry the run's provenance; that of a plate belongs to all its runs."""
        groups = [group.location for group in self.iter_groups()]
        if not self.is_in_place and self.plan.plate is None:
            groups.insert(0, self.location)
        return list(dict.fromkeys(groups))

    @property
    def mark(self) -> dict[str, str]:
        """What the groups of the run carry until it is complete."""
        return {"unfinished": self.plan.identity}

    def array(self, kind: str, output: Output, level: int = 0) -> Volume:
        """Return the scores, mask or labels of one output of a volume."""
        planned = self.plan.volumes[output.volume]
        channel = self.plan.target_channel(output)
        image = ImageTarget(self.plan, planned.image)
        group = image.group(kind, "" if kind == "scores" else self.plan.suffixes[channel])
        metadata = image.metadata_of(group)
        volume = Volume.of(group.location, metadata, level=level, t=planned.target_t, c=channel)
        # Of a run that follows its source, what is written is published when it is whole.
        return replace(volume, may_be_ahead=self.plan.grows)

    def create_images(self) -> None:
        """Create the groups and empty arrays of all images.

        The fields of a plate are alike: the first is made with care, and its metadata are copied.

        Raises:
            StoreError: The store failed.
        """
        first, *others = self.images
        first.create(self.mark)
        if not others:
            return
        template = first.read_metadata()
        of_arrays = {key for key in template if PurePosixPath(key).parent.name.isdigit()}

        def copy(image: ImageTarget, keys: Collection[str]) -> None:
            for key in keys:
                image.location.put(key, template[key])

        # As those of the first: marks, and then arrays.
        of_groups = [key for key in template if key not in of_arrays]
        map_threaded(lambda image: copy(image, of_groups), others)
        self.location.sync()
        map_threaded(lambda image: copy(image, of_arrays), others)

    def sweep(self) -> None:
        """Remove what writers left that were killed; in a source, only what is ours."""
        if not self.is_in_place:
            self.location.sweep_partial()
            return
        map_threaded(ImageTarget.sweep, self.images)
        self.location.sweep_staged(_DOCUMENTS)

    def restore(self) -> None:
        """Write again what is lost or damaged of the metadata of all images of a run that goes on.

        Raises:
            StoreError: The store failed.
        """
        for node in self.plate_nodes:
            remove_damaged_group(node, self.version)
        map_threaded(ImageTarget.restore, self.images)

    def remove_damaged(self) -> None:
        """Remove damaged metadata of the groups that a run replaces, of any version.

        Raises:
            StoreError: The store failed.
        """
        for version in VERSIONS:
            for node in self.plate_nodes:
                remove_damaged_group(node, version)
            remove = partial(ImageTarget.remove_damaged, version=version)
            map_threaded(remove, self.images)

    @property
    def plate_nodes(self) -> list[Location]:
        """The groups of a plate of ours above its fields: plate, rows and wells."""
        if not self.is_whole_plate:
            return []
        assert self.plan.plate is not None
        fields = self.plan.plate.fields
        below = [name for field in fields for name in (field.row, field.well)]
        return [self.location, *(self.location / name for name in dict.fromkeys(below))]

    def clear(self) -> None:
        """Remove what the run would write at the target; nothing else.

        The metadata go last: they tell that the arrays are ours, should this be interrupted.
        """
        if self.location.exists():
            map_threaded(ImageTarget.remove_arrays, self.images)
            self.location.sync()
            map_threaded(ImageTarget.remove_groups, self.images)


def folders(group: Location) -> set[str]:
    """Return the names of the folders in a group."""
    return {name for name in group.children() if (group / name).is_folder()}
