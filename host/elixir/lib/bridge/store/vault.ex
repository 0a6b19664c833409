defmodule Bridge.Store.Vault do
  @moduledoc false
  # Seals and unseals secrets, and keeps the key to them: in memory, or in the file `secrets.key` of a durable store,
  # which only its owner can read. AES-256-GCM; what is sealed for one place cannot be unsealed as another's. The key is
  # made when the first secret is sealed, and stays in the process that has the vault.

  alias Bridge.Error
  alias Bridge.Store.Files

  @key_file "secrets.key"
  @key_bytes 32
  @nonce_bytes 12
  @tag_bytes 16

  @enforce_keys [:path, :key]
  # The key is in a function: no inspect, crash report or trace shows what is in there.
  @derive {Inspect, only: [:path]}
  defstruct @enforce_keys

  @type t :: %__MODULE__{path: Path.t() | nil, key: (() -> binary()) | nil}

  @doc "The vault of the store in that directory; without one its key is kept by nobody."
  @spec new(Path.t() | nil) :: t()
  def new(nil) do
    key = :crypto.strong_rand_bytes(@key_bytes)
    %__MODULE__{path: nil, key: fn -> key end}
  end

  def new(directory), do: %__MODULE__{path: Path.join(directory, @key_file), key: nil}

  @doc "Encrypted and authenticated, for that place. Makes the key if there is none."
  @spec seal(t(), binary(), String.t()) :: {:ok, binary()} | {:error, Error.t()}
  def seal(%__MODULE__{} = vault, clear, place) do
    with {:ok, key} <- key(vault, :make) do
      nonce = :crypto.strong_rand_bytes(@nonce_bytes)
      {sealed, tag} = :crypto.crypto_one_time_aead(:aes_256_gcm, key.(), nonce, clear, place, @tag_bytes, true)
      {:ok, <<1, nonce::binary, tag::binary, sealed::binary>>}
    end
  end

  @doc "What was sealed. `what` is what an error calls it."
  @spec unseal(t(), binary(), String.t(), String.t()) :: {:ok, binary()} | {:error, Error.t()}
  def unseal(vault, sealed, place, what \\ "a secret")

  def unseal(
        %__MODULE__{} = vault,
        <<1, nonce::binary-size(@nonce_bytes), tag::binary-size(@tag_bytes), sealed::binary>>,
        place,
        what
      ) do
    case key(vault, :read) do
      {:ok, key} ->
        case :crypto.crypto_one_time_aead(:aes_256_gcm, key.(), nonce, sealed, place, tag, false) do
          :error -> altered(vault, what)
          clear -> {:ok, clear}
        end

      {:error, error} ->
        Error.error(:secret_unreadable, "#{what} cannot be unsealed: #{error.message}", remedy: error.remedy)
    end
  end

  def unseal(%__MODULE__{} = vault, _sealed, _place, what), do: altered(vault, what)

  defp altered(vault, what) do
    Error.error(
      :secret_unreadable,
      "#{what} cannot be unsealed: it was altered, or sealed with another key than that in #{place(vault)}"
    )
  end

  defp place(%{path: nil}), do: "this bridge's memory"
  defp place(%{path: path}), do: "the file #{path}"

  defp key(%{key: key}, _make) when is_function(key, 0), do: {:ok, key}

  # Read each time: a secret is wanted seldom, and the file may have been put back.
  defp key(%{path: path} = vault, make) do
    case File.lstat(path) do
      {:ok, %{type: :regular, size: size, mode: mode}} -> read(vault, size, Bitwise.band(mode, 0o777), make)
      {:ok, _other} -> Error.error(:secret_unreadable, "#{place(vault)} is no ordinary file")
      {:error, :enoent} -> missing(vault, make)
      {:error, reason} -> unreadable(vault, reason)
    end
  end

  defp read(vault, _size, mode, _make) when Bitwise.band(mode, 0o077) != 0 do
    Error.error(
      :secret_unreadable,
      "the key in #{place(vault)} is open to other users of this machine (mode 0#{Integer.to_string(mode, 8)})",
      remedy: "Close it: chmod 600 #{vault.path} And set the secrets anew if somebody may have read it."
    )
  end

  defp read(%{path: path} = vault, @key_bytes, _mode, _make) do
    case File.read(path) do
      {:ok, <<key::binary-size(@key_bytes)>>} -> {:ok, fn -> key end}
      {:ok, _other} -> Error.error(:secret_unreadable, "what is in #{place(vault)} is no key")
      {:error, reason} -> unreadable(vault, reason)
    end
  end

  defp read(vault, _size, _mode, _make), do: Error.error(:secret_unreadable, "what is in #{place(vault)} is no key")

  defp missing(vault, :read), do: Error.error(:secret_unreadable, "there is no key in #{place(vault)}")

  defp missing(%{path: path} = vault, :make) do
    key = :crypto.strong_rand_bytes(@key_bytes)

    # On disk before anything that it sealed is; and never in the place of another.
    case Files.create(path, key) do
      :ok ->
        {:ok, fn -> key end}

      {:error, reason} ->
        Error.error(
          :secret_unreadable,
          "the key of secrets cannot be kept in #{place(vault)}: #{:file.format_error(reason)}",
          remedy: "See to the permissions and the space there; nothing was sealed."
        )
    end
  end

  defp unreadable(vault, reason) do
    Error.error(:secret_unreadable, "the key in #{place(vault)} cannot be read: #{:file.format_error(reason)}",
      remedy: "Make it readable for its owner alone: chmod 600 #{vault.path}"
    )
  end
end
