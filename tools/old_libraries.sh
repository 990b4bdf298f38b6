#!/usr/bin/env bash
# Makes FOLDER. What is linked with -LFOLDER on a new system also runs on an old one: glibc 2.28 (manylinux_2_28), any libstdc++.
#   tools/old_libraries.sh FOLDER PYTHON         PYTHON has the package ziglang
# The linker takes a symbol's newest version from the libraries that it sees. Zig knows which symbols each glibc had and makes empty
# libraries with those; libstdc++ is the compiler's static one. A symbol that is in neither stays without a version:
# tools/check_abi.py finds it.
set -euo pipefail
folder=$1 python=$2
rm -rf "$folder"
mkdir -p "$folder/cache"
folder=$(realpath "$folder")

echo 'int nothing;' > "$folder/nothing.c"
ZIG_GLOBAL_CACHE_DIR=$folder/cache ZIG_LOCAL_CACHE_DIR=$folder/cache \
  "$python" -m ziglang cc -target "$(uname -m)-linux-gnu.2.28" -shared "$folder/nothing.c" -o "$folder/nothing.so"
for library in "$folder"/cache/o/*/lib*.so.*; do
  name=$(basename "$library")
  mv "$library" "$folder/"
  ln -sf "$name" "$folder/${name%%.so.*}.so"
done
rm -r "$folder/cache" "$folder"/nothing.*

# Headers of a newer glibc let the reference counts of libstdc++ ask it whether there is one thread. This says no.
echo '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;' \
  | cc -x c -c -fPIC -o "$folder/single_threaded.o" -
ar rcs "$folder/libnewer.a" "$folder/single_threaded.o"
# What is in libc today was in libraries of its own.
cat > "$folder/script" <<END
GROUP ( $folder/libc.so.6 $(cc -print-file-name=libc_nonshared.a) $folder/libnewer.a
  AS_NEEDED ( $folder/libpthread.so.0 $folder/libdl.so.2 $folder/librt.so.1 $folder/libld.so.2 ) )
END
mv "$folder/script" "$folder/libc.so" # a link until now
echo "INPUT ( $(c++ -print-file-name=libstdc++.a) )" > "$folder/libstdc++.so"
