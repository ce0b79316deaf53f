for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  const text = document.getElementById(button.dataset.copy).textContent;
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { button.textContent = "Select the line and copy it"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
const viewer = document.getElementById("viewer");
if (viewer) {
  document.documentElement.classList.add("can-enlarge");
  for (const button of document.querySelectorAll("button.enlarge")) {
    button.addEventListener("click", () => {
      const small = button.querySelector("img");
      const large = viewer.querySelector("img");
      large.src = small.src;
      large.alt = small.alt;
      viewer.querySelector("p").textContent = small.alt;
      viewer.showModal();
    });
  }
  viewer.addEventListener("click", () => viewer.close());
}
